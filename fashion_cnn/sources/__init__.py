"""Where fetch_fashion_mnist fetches from."""
