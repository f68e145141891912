"""A recorded episode made by hand."""

import dataclasses

import numpy as np


@dataclasses.dataclass
class Raw:
    """A RawEpisode of plain dictionaries."""

    num_steps: int
    numbers: dict
    texts: dict = dataclasses.field(default_factory=dict)
    pictures: dict = dataclasses.field(default_factory=dict)
    fps: float | None = None
    where: str = "file-00000, episode 7"
    episode_id: str = "train/7"

    def has(self, key):
        return key in self.numbers or key in self.texts or key in self.pictures

    def read(self, key):
        return np.asarray(self.numbers[key])

    def text(self, key):
        text = self.texts[key]
        return text.decode() if isinstance(text, bytes) else text

    def images(self, key):
        return self.pictures[key]


@dataclasses.dataclass
class Recording:
    """A Source of raw episodes."""

    episodes: list

    def __len__(self):
        return len(self.episodes)

    def episode(self, number):
        return self.episodes[number]

    def keys(self):
        return {"image": "image"}

    def fingerprint(self):
        return f"recording of {len(self.episodes)}"
