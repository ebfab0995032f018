"""The words of the tasks as text: parts of keys, words to be counted, and sentences that say nothing."""

# No noun begins with another noun: a key must not read as the beginning of another key.
ADJECTIVES = (
    *("able", "amber", "bold", "brave", "brief", "bright", "broad", "calm", "civil", "clean", "clever", "cool"),
    *("crisp", "daily", "deep", "double", "eager", "early", "empty", "even", "exact", "faint", "famous", "fierce"),
    *("firm", "fresh", "gentle", "grand", "happy", "heavy", "honest", "humble", "inner", "keen", "kind", "large"),
    *("late", "loyal", "lucky", "modern", "narrow", "noble", "odd", "plain", "proud", "quick", "quiet", "rapid"),
)
NOUNS = (
    *("anchor", "arrow", "basket", "beacon", "bottle", "branch", "bridge", "bucket", "button", "candle", "canyon"),
    *("carpet", "castle", "circle", "corner", "cradle", "curtain", "desert", "engine", "feather", "forest"),
    *("garden", "glacier", "hammer", "harbour", "island", "jacket", "kettle", "ladder", "lantern", "magnet"),
    *("marble", "meadow", "mirror", "needle", "orchard", "packet", "pebble", "pillow", "pocket", "ribbon"),
    *("saddle", "shadow", "tunnel", "valley", "village", "window", "winter"),
)
# What is asked for, and its words.
GROUPS = (
    ("animal", ("otter", "rabbit", "falcon", "salmon", "beetle", "donkey", "lizard", "badger")),
    ("fruit", ("cherry", "apricot", "lemon", "papaya", "quince", "raisin", "melon", "banana")),
    ("metal", ("copper", "nickel", "silver", "cobalt", "tin", "zinc", "iron", "mercury")),
    ("instrument", ("violin", "trumpet", "guitar", "piano", "cello", "flute", "banjo", "oboe")),
)
SENTENCES = (
    "The road goes up the hill and down again.",
    "It rained a little in the afternoon.",
    "People walk by and nobody is in a hurry.",
    "A train leaves every hour.",
    "The sea was flat and grey.",
    "There is tea on the table.",
    "Snow lies on the roofs.",
    "Some doors are open and some are not.",
    "The wind has turned to the west.",
    "Children play in the yard.",
    "A clock ticks in the hall.",
    "The bread is still warm.",
    "Nothing much happened after that.",
    "The lamps go out one by one.",
    "Boats come back in the evening.",
    "Leaves fall and are swept away.",
    "The shop on the square is closed on Mondays.",
    "Then everything was as before.",
    "Smoke rises from the chimneys.",
    "The river is low at this time of the year.",
    "We sat for a while and said nothing.",
    "A dog barks somewhere far away.",
    "The letters are on the shelf.",
    "Clouds pass over the fields.",
)
