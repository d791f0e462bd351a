"""The engine: interventions and captures on a running model, by nnsight."""
