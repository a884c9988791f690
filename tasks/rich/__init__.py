"""The rich families of the text bias probe: digits, letters, charts, a clock, a table, an arrow and a die.

They ask what vision-language models are used for beyond plain shapes. `drawing` draws an item (what a picture holds, as
JSON), `rendering` makes its picture, `wording` holds the sentences in English and Chinese, and `groups` puts the groups
of a task together.
"""
