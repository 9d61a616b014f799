"""The published weights: where they are, and what may be done with them."""

PRIOR_REPO = "stabilityai/stable-cascade-prior"
DECODER_REPO = "stabilityai/stable-cascade"
OFFICIAL_REPOS = (PRIOR_REPO, DECODER_REPO)
OFFICIAL_LICENCE = "Stability AI non-commercial research community licence"
UNKNOWN_LICENCE = "that of the checkpoint, which does not say"
