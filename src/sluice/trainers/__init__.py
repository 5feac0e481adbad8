"""What turns batches into updates, and the model it updates."""
