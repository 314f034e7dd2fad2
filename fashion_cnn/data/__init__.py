"""Fashion-MNIST: its files, the split, and the files of augmented copies."""
