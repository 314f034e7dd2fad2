"""The implementations of the commands of fashion-cnn."""
