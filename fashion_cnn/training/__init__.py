"""How train_cnn trains: data, loop, checkpoints."""
