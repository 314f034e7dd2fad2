"""What the commands of fashion-cnn do."""
