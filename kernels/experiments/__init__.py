"""What is built and tested, and not proven to pay: nothing here is chosen unless it is asked for."""
