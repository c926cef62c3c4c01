"""What is measured: a file a measurement, each with the words for what its figures are."""
