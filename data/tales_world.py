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
THINGS = {
    "kite": "fly", "drum": "beat", "boat": "sail", "flute": "play", "doll": "dress",
    "lamp": "light", "bell": "ring", "whistle": "blow", "puppet": "move", "horn": "blow",
    "train": "drive", "crown": "wear", "robot": "move", "clock": "wind", "cup": "fill",
    "basket": "carry", "wagon": "pull", "wand": "wave", "harp": "play", "box": "open",
}
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
    "glad": (("happy", "glad"),
             ("laughed", "smiled", "danced with joy", "clapped {W:his} hands")),
    "sad": (("sad", "unhappy"),
            ("cried", "sighed", "sat down and cried", "could not smile any more")),
    "angry": (("angry", "cross"),
              ("shouted", "stamped {W:his} foot", "frowned", "shook {W:his} head")),
    "scared": (("scared", "afraid"),
               ("screamed", "shook all over", "held {W:his} breath", "turned pale")),
    "proud": (("proud",),
              ("smiled from ear to ear", "stood very tall", "could not stop singing",
               "whistled a song")),
    "sorry": (("sorry", "ashamed"),
              ("turned red", "looked at the ground", "hung {W:his} head", "did not say a word")),
}
# The ways to tell a mood; {why} is a clause of the event that caused it.
FRAMES_WITH_WHY = ("{W} was {mood}, because {why}.",
                   "{W} felt {mood}, because {why}.",
                   "{W} was very {mood}, because {why}.")
FRAMES_WITH_ACT = ("{W} {act}, because {why}.",)
FRAMES_ALONE = ("That made {W:him} {mood}.",
                "How {mood} {W} was!")
FRAMES_OF_BOTH = ("{W} was so {mood} that {W} {act}.",)


def with_article(adjective, noun):
    """"an orange kite"."""
    article = "an" if adjective[0] in "aeiou" else "a"
    return f"{article} {adjective} {noun}"
