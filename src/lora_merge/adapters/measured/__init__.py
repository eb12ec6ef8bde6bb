"""What the numbers of an adapter say: spectra, statistics of inputs, fingerprints."""
