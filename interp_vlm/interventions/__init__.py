"""The four interventions, as plain values, and ways to vary them."""
