"""What would fail on this machine or pod, found before any compile."""
