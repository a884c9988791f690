"""The words of the probes: outcomes of a reply, and the conditions under which a question is asked."""

GOLD, LURE, OTHER, PARSE_FAIL = OUTCOMES = ("gold", "lure", "other", "parse_fail")
CLEAN, MATCH, CONFLICT, IRRELEVANT, TEXT_ONLY_CONFLICT, BLANK = CONDITIONS = (
    "clean",  # the image and the question
    "match",  # with a true sentence about the image
    "conflict",  # with a false one, which names the lure
    "irrelevant",  # with a sentence about something else
    "text_only_conflict",  # the false sentence and no image
    "blank",  # the question and a gray image
)
# Further conditions of the other probes.
NOISE, SHUFFLED, MISMATCHED, NO_IMAGE, CAPTION_ORACLE = (
    "noise",  # the question and random pixels
    "shuffled",  # the image's own patches in another order
    "mismatched",  # an image with another answer, which is the lure
    "none",  # the question alone
    "caption_oracle",  # the scene described in words, no image
)
FILLER, BEFORE, OPINION, AUTHORITY = (
    "filler",  # a sentence about nothing of the kind
    "before",  # the sentence of `conflict` in front of the image
    "opinion",  # the false claim as the user's opinion
    "authority",  # the false claim as an expert's
)
LURE_WORD, GOLD_WORD, RANDOM_WORD, READ = (
    "lure_word",  # the lure written in the image
    "gold_word",  # gold written in the image
    "random_word",  # a word that is no answer written in the image
    "read",  # the image of `lure_word`, asked for the written word, which is gold there
)
MISMATCH = "mismatch"  # a benchmark's row with the images of another: the question has no known answer there
# Image and question of a pair: gold is the answer for this image, the lure the one for the other.
PAIR_CONDITIONS = ("image0_question0", "image0_question1", "image1_question0", "image1_question1")
