"""The words of the tales: who there is, what there is, where it is, how it feels.

A word stands here once, with all that the sentences need to know of it. Nothing here knows what
happens: that is the table in tales_events.py.
"""

GIRLS = ("Mia", "Lily", "Anna", "Rosa", "Emma", "Zoe", "Nina", "Clara", "Ivy", "Ruth")
BOYS = ("Tom", "Ben", "Max", "Leo", "Sam", "Finn", "Hugo", "Paul", "Oscar", "Jack")
NAMES = GIRLS + BOYS
GENDER = {name: "girl" for name in GIRLS} | {name: "boy" for name in BOYS}
PRONOUNS = {"girl": {"he": "she", "him": "her", "his": "her"},
            "boy": {"he": "he", "him": "him", "his": "his"}}

# Each thing can be carried, broken, painted and washed; the verb says what one does with it.
TOYS = {"kite": "fly", "boat": "sail", "doll": "dress", "puppet": "move", "crown": "wear",
        "cup": "fill", "basket": "carry", "wagon": "pull", "wand": "wave", "box": "open",
        "lamp": "light"}
LOUD = {"drum": "beat", "flute": "play", "bell": "ring", "whistle": "blow", "horn": "blow",
        "train": "drive", "robot": "move", "clock": "wind", "harp": "play"}
THINGS = TOYS | LOUD
COLOURS = ("red", "blue", "green", "yellow", "orange", "purple")
ADJECTIVES = COLOURS + ("pretty", "new", "wooden", "shiny", "tiny", "striped")

# place: (where something is, where somebody goes)
PLACES = {
    "garden": ("in the garden", "to the garden"),
    "forest": ("in the forest", "into the forest"),
    "barn": ("in the barn", "to the barn"),
    "market": ("at the market", "to the market"),
    "school": ("at the school", "to the school"),
    "beach": ("on the beach", "to the beach"),
    "river": ("by the river", "down to the river"),
    "hill": ("on the hill", "up the hill"),
    "park": ("in the park", "to the park"),
    "mill": ("behind the mill", "to the mill"),
}
ANIMALS = ("dog", "cat", "goat", "monkey", "goose", "pig", "fox", "donkey")

# mood: (what one is, what one does)
MOODS = {
    "glad": ("happy", "laughed"),
    "sad": ("sad", "cried"),
    "angry": ("angry", "stamped {W:his} foot"),
    "scared": ("scared", "shook all over"),
    "proud": ("proud", "smiled from ear to ear"),
    "sorry": ("sorry", "turned red"),
}
# The ways to tell a mood; {why} is a clause of the event that caused it.
MOOD_FRAMES = ("{W} was {mood}, because {why}.",
               "{W} felt {mood}, because {why}.",
               "{W} {act}, because {why}.",
               "That made {W:him} {mood}.",
               "How {mood} {W} was!")


def with_article(adjective, noun):
    """"an orange kite"."""
    article = "an" if adjective[0] in "aeiou" else "a"
    return f"{article} {adjective} {noun}"
