"""One merge in several runs: shards of its modules, on any machines, and the join of them."""
