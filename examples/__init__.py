"""The example programs, installed so that the command line can start them."""
