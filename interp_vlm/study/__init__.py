"""The study: five experiments on one or more models, from the command line to a report."""
