"""The report card: the same questions after different prefixes, with confidence intervals."""
