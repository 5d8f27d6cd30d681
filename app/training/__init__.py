"""The training loop: tasks, steps, events, history."""
