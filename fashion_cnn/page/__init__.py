"""The page that build_page writes: one HTML file with style, code, data and both CNNs' weights."""
