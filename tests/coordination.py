"""JAX's coordination service, of one dictionary."""

import threading


class Service:
    """What JAX's client of it does, for processes that are threads; `calls` are those of all."""

    def __init__(self, count: int):
        self.count = count
        self.values = {}
        self.waiting = {}
        self.calls = []
        self.lost = ""  # a "task", or the "coordinator"
        self.changed = threading.Condition()

    def key_value_set(self, key, value, allow_overwrite=False):
        with self.changed:
            self.calls.append("set")
            assert allow_overwrite or key not in self.values
            self.values[key] = value
            self.changed.notify_all()

    def blocking_key_value_get(self, key, milliseconds):
        with self.changed:
            self.calls.append("get")
            if not self.changed.wait_for(lambda: key in self.values, milliseconds / 1000):
                raise RuntimeError("DEADLINE_EXCEEDED: " + key)
            return self.values[key]

    def wait_at_barrier(self, barrier, milliseconds):
        with self.changed:
            self.calls.append("barrier")
            self.waiting[barrier] = self.waiting.get(barrier, 0) + 1
            self.changed.notify_all()
            here = self.count - bool(self.lost)
            self.changed.wait_for(lambda: self.waiting[barrier] == here, 20)
            if self.waiting[barrier] < self.count:
                raise RuntimeError("UNAVAILABLE: a task has crashed")

    def key_value_dir_get(self, directory):
        with self.changed:
            self.calls.append("dir_get")
            if self.lost == "coordinator":
                raise RuntimeError("UNAVAILABLE: Socket closed")
            return [(k, v) for k, v in sorted(self.values.items()) if k.startswith(directory + "/")]

    def key_value_delete(self, directory):
        with self.changed:
            self.calls.append("delete")
            for key in [key for key in self.values if key.startswith(directory + "/")]:
                del self.values[key]
