"""The update of the matrices: directions and step rules, their cases, their quality, their times."""
