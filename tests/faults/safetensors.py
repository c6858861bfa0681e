"""Faults of exports as safetensors, of their import, and of runs that start from weights."""

from faults.fault import Fault

EXPORT, INITIAL = "export_safetensors", "initial"
FAULTS = (
    Fault(
        "raw weights leave as the average",
        "export/trained.py",
        '"average": "ema", "raw": "parameters"',
        '"average": "parameters", "raw": "ema"',
        f"{EXPORT}::test_the_weights_asked_for_leave_and_torch_users_can_read_them",
    ),
    Fault(
        "heads and width of the output projection swapped",
        "model/published.py",
        '2 if leaf == "out_NHD" else 1',
        "1",
        f"{EXPORT}::test_the_weights_asked_for_leave_and_torch_users_can_read_them",
    ),
    Fault(
        "convolutions leave as they lie",
        "model/published.py",
        "return array.transpose(3, 2, 0, 1)",
        "return array.transpose(3, 2, 1, 0)",
        "torch_reference::test_a_convolution_leaves_as_torch_has_it",
    ),
    Fault(
        "gate and up swapped",
        "model/published.py",
        '"mlp.gate_DF": "mlp.gate_proj.weight",\n    "mlp.up_DF": "mlp.up_proj.weight",',
        '"mlp.gate_DF": "mlp.up_proj.weight",\n    "mlp.up_DF": "mlp.gate_proj.weight",',
        "torch_reference::test_logits_and_predictions_of_mixed_rows_are_ours",
    ),
    Fault(
        "all layers are the first",
        "export/trained.py",
        "yield from self.arrays.parts(name) if self.stacked(name) else (self.read(name),)",
        "yield from [next(self.arrays.parts(name))] * self.shapes[name].shape[0] "
        "if self.stacked(name) else (self.read(name),)",
        f"{EXPORT}::test_the_weights_asked_for_leave_and_torch_users_can_read_them",
    ),
    Fault(
        "the array before is kept while the next is read",
        "export/shards.py",
        "_write_tensor(opened, name, described, next(arrays))",
        "found = next(arrays)\n            _write_tensor(opened, name, described, found)",
        f"{EXPORT}::test_a_part_of_one_array_is_held_at_a_time",
    ),
    Fault(
        "a file may be too large by a tensor",
        "export/shards.py",
        "if shards[-1] and size + described.nbytes > largest:",
        "if shards[-1] and size > largest:",
        f"{EXPORT}::test_files_are_bounded_and_their_index_is_right",
    ),
    Fault(
        "no metadata for transformers",
        "export/shards.py",
        '{"__metadata__": {"format": "pt"}}',
        "{}",
        f"{EXPORT}::test_files_are_bounded_and_their_index_is_right",
    ),
    Fault(
        "rope_theta for transformers 5 alone",
        "model/published.py",
        '        "rope_theta": model.rope_theta,\n',
        "",
        f"{EXPORT}::test_what_is_beside_the_tensors",
    ),
    Fault(
        "a damaged checkpoint leaves",
        "export/trained.py",
        "            arrays.verify()\n",
        "",
        f"{EXPORT}::test_the_checksum_of_what_leaves_is_compared",
    ),
    Fault(
        "the last chunk of an array is not read",
        "training/arrays.py",
        "range(a - a % step, b, step)",
        "range(a - a % step, max(b - step, a + 1), step)",
        f"{EXPORT}::test_the_weights_asked_for_leave_and_torch_users_can_read_them",
    ),
    Fault(
        "a half-written export looks whole",
        "files.py",
        "        yield temporary\n        os.replace(temporary, path)\n",
        "        path.mkdir(exist_ok=True)\n        yield path\n",
        f"{EXPORT}::test_bad_input_is_one_line",
    ),
    Fault(
        "a truncated file is read",
        "tensors.py",
        "needed == held,",
        "True,",
        "tensors::test_a_truncated_file_is_damaged",
    ),
    Fault(
        "an index may name files elsewhere",
        "tensors.py",
        "name for name in names if name != Path(name).name",
        "name for name in names if not name",
        "tensors::test_a_directory_is_the_files_that_its_index_names",
    ),
    Fault(
        "every device reads the first part",
        "pretraining/initial.py",
        "cut(part, index[1:])",
        "cut(part, tuple(slice(0, (x.stop or n) - (x.start or 0)) "
        "for x, n in zip(index[1:], part.shape)))",
        f"{INITIAL}::test_a_run_starts_from_an_import_of_an_export_on_any_mesh",
    ),
    Fault(
        "a resumed run reads the weights again",
        "pretraining/run.py",
        'if experiment.train.initial and not stored_steps(directory / "checkpoints"):',
        "if experiment.train.initial:",
        f"{INITIAL}::test_a_new_run_starts_from_weights_and_a_resumed_one_does_not_read_them",
    ),
    Fault(
        "weights of other heads are taken",
        "pretraining/initial.py",
        '    "text_config.num_attention_heads",\n',
        "",
        f"{INITIAL}::test_weights_of_another_model_are_refused",
    ),
    Fault(
        "weights of another tokenizer are taken",
        "pretraining/initial.py",
        "not theirs.exists() or theirs.read_bytes() == tokenizer.model",
        "True",
        f"{INITIAL}::test_another_tokenizer_is_refused_by_name",
    ),
    Fault(
        "all processes write",
        "parallel/processes.py",
        "    error = None\n    if is_leader():",
        "    error = None\n    if True:",
        "export_processes::test_two_processes_write_what_one_does_and_refuse_together",
    ),
    Fault(
        "weights that came without a tokenizer start a run with any",
        "pretraining/initial.py",
        "theirs.exists() or boi == tokenizer.boi,",
        "True,",
        "initial::test_weights_without_a_tokenizer_need_one_with_their_special_tokens",
    ),
)
