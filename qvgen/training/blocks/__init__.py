"""The blocks of a transformer while it trains: computed again, compiled, or brought from the host one after another."""
