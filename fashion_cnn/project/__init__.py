"""What every stage uses: how its process starts and ends, its errors and its files."""
