"""What the commands of fashion-cnn do, and the searches of a team."""
