"""What is trained. A task knows its model, its batches, its loss and its evaluation; the trainer knows none of these."""
