"""The lesson: the toy, layers by hand, augmentation, the evaluation, and figures of the results."""
