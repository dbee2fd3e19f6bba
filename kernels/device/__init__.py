"""What every kernel uses: launches, random numbers, tile arithmetic."""
