"""PEFT's other tuners: what each stores for a module, and the delta it is."""
