"""The miniature world: drawn scenes, a grammar, spoken clips, and the recipes of the embedded model."""
