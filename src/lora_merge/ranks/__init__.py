"""From spectra to ranks: measures, rules, budgets."""
