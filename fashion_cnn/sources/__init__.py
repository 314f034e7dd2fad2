"""The sources of the stage fetch_fashion_mnist."""
