"""Dense implementations: any floating dtype, gradients by autograd. They are the specification of each operation."""
