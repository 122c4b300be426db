"""The texts of the seed prompts, all independent of the corpus."""

FORMATS = ("JSON", "YAML", "TOML", "XML", "INI", "plain text")

STRUCTURING = (
    "Write one request that asks for a part of the text to be restructured as {format}, with the exact "
    "names and numbers. Name the part. Write only the request.",
    "Ask for the facts about one subject of the text to be listed as {format}. Name the subject. Write "
    "only the request.",
)
SUMMARIZATION = (
    "Write one request for a summary of a particular part of the text. Name the part. Write only the "
    "request.",
    "Ask for the main points about one subject of the text in two sentences. Write only the request.",
)
QUESTION = (
    "Write one question about a detail of the text. Whoever reads it does not have the text, so name the "
    "people, places and things it is about. Write only the question.",
    "Write one question that tests whether somebody remembers a number, a date or a name from the text. "
    "Name what it is about. Write only the question.",
)
USE_CASE = (
    "Think of somebody who needs this text for a practical task. Write one question that this person "
    "would ask, with the names it concerns. Write only the question.",
)
CREATIVE = (
    "Write one unusual request that only somebody who knows the text could fulfil, such as a comparison, "
    "a rhyme or a letter. Name its subject. Write only the request.",
)
GENERIC = ("Write one message that starts a conversation about the text. Write only the message.",)
FOLLOW_UP = (
    "Somebody who does not have the text asked the question below and got the answer below it. Write the question "
    "that this person asks next, about another detail of the text. Name what it is about. Write only the question.",
    "Below are a question about the text and its answer. Write another question, about something in the text that "
    "goes with it. Name the people, places and things it is about. Write only the question.",
)
"""Question and answer of the previous round are appended."""

ASKING_EXAMPLES = """Each question is answered by the text.

Text: The cloth market of Veldt opens at 7:30 and is closed on Mondays.
Answer: 7:30
Question: When does the cloth market of Veldt open?

Text: Sister Amalie Roux built the well in 1655 with money from the salt tax.
Answer: Sister Amalie Roux
Question: Who built the well in 1655?

Text: In Dorne the winter grain is stored in stone towers to keep it from the mice.
Answer: stone towers
Question: Where is the winter grain of Dorne stored?

Text: Prices at the ferry. Passenger: Horse; Fare: 12 groats.
Answer: 12 groats
Question: How much is the fare for a horse at the ferry?

Text: The limit of length for the canal boats is 31 feet.
Answer: 31
Question: What is the limit of length for the canal boats?

Text: The lantern fish, which glows blue when it is frightened, lives below 900 metres.
Answer: blue
Question: What colour does the lantern fish glow when it is frightened?

"""
"""Few-shot examples about invented texts: a small model asks far better this way than by instruction."""
