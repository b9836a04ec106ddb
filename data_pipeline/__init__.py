"""From image files to augmented batches on the device. Imports nothing of `train` or `launch`."""
