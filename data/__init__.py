"""Small shipped data: potentials with their cards, recipes, reference values with citations."""
