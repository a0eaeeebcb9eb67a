"""Networks: backbones, margin heads and losses. Imports torch only."""
