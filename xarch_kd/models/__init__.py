"""Models: loading, conversion of a Transformer into a hybrid student, fresh students, export."""
