"""What holds for one call of a model, from where it enters to where it leaves."""
