"""The options of the measurements, one file each."""
