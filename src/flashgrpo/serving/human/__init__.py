"""People as a reward: `flashgrpo reward human FOLDER`."""
