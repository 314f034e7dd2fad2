"""What build_page writes: one HTML file with its style, its code, its data and both CNNs' weights."""
