"""The loss of a training step: which noise levels are drawn, what is compared, and how much each error counts."""
