"""Adaptation of a trained model to the panel it imputes from, and to the sites its targets are typed at."""
