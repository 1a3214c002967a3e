"""A few pages of plain text to train the tokenizer of random checkpoints on."""

from __future__ import annotations

TEXT = """\
The picture shows a small red house beside a green field. A road runs from the house to the river, and two people walk
along the road with a brown dog. The sky is blue with a few white clouds, and the sun stands low above the trees.
In the first picture there is a square, in the second picture there is a circle, and in the third picture there is a
triangle. The square is yellow, the circle is black, and the triangle is orange. Which of these shapes is the largest?
The largest shape is the circle, because it fills almost the whole picture. The smallest shape is the triangle.
What is shown in this image? Describe the image in one sentence. Describe what happens in the video, step by step.
The video starts with an empty street at night. After four seconds a car comes from the left side and stops at the
light. Then a woman with a white umbrella crosses the street. At the end of the video the car turns right.
How many people are there in the picture? There are three people: one man, one woman and one child. The child holds a
paper boat in the left hand and points to the water with the right hand.
Read the text in the picture. The text says: open every day from nine in the morning to six in the evening.
The table has four columns and ten rows. The first column holds the name, the second column holds the year, the third
column holds the number of visitors, and the last column holds the difference from the year before.
I am an assistant. I can answer questions about pictures, about videos, and about text. Let me think about it first.
Let me look at the upper left corner of the picture again. There is a sign with a number on it, but the number is too
small to read. I should zoom into that part of the picture and then answer the question.
First, we count the windows on the left wall. There are five windows. Next, we count the windows on the right wall.
There are seven windows. So the house has twelve windows in all. Therefore the answer is twelve.
If a train leaves at eight and arrives at half past ten, the journey takes two and a half hours. If it leaves half an
hour later, it arrives at eleven, provided that it is just as fast as before.
The old clock on the tower strikes every hour. People in the village set their watches by it, although everybody knows
that it is a little slow in winter, when the oil in the works gets thick from the cold.
Water boils when it is heated to a certain temperature. The higher you climb, the lower this temperature becomes, since
the air presses less on the surface of the water. On a high mountain an egg takes longer to cook for this reason.
To make bread you need flour, water, salt and time. Mix the flour with the water and the salt, leave the dough to rest,
fold it over every now and then, shape it, let it rise, and bake it in a hot oven until the crust is dark.
A list has a first element and a last element. A tree has a root and leaves. A graph has nodes and edges, and every edge
joins two nodes. To search a graph, keep a queue of nodes that were seen but not yet visited.
The program reads a file, splits it into lines, and prints the longest line. When the file cannot be opened, the program
prints an error message and returns a value other than zero. Otherwise it returns zero.
def add(left, right): return left + right. for item in items: print(item). if value is None: raise ValueError(name).
{"name": "zoom", "arguments": {"box": [1, 2, 3, 4], "label": "sign"}} {"answer": true, "items": ["one", "two", "three"]}
She said that she would come later. He asked whether he should wait. They decided to go without them, which turned out
to be a mistake, because the others had the only map. Where are you going? Could you tell me where the station is?
Yes, of course. Go straight on, take the second street on the right, and you will see the station in front of you.
Thank you very much. You are welcome. Good morning. Good evening. See you tomorrow at the same time and the same place.
The museum was built between the two wars and has been open to the public ever since. Its best known picture is a large
painting of the harbour in the early light, with fishing boats, gulls, and a long line of houses behind the masts.
Between the mountains and the sea lies a narrow strip of land where grapes, olives and oranges grow. The people there
speak a language of their own, with more than thirty words for different kinds of wind.
A language model predicts the next token from the tokens before it. A vision model turns patches of an image into
vectors. Together they answer questions about what can be seen. Some experts work on text, other experts work on images.
Each request waits in a queue until there is room. Then its pictures are cut into patches, the patches become vectors,
the vectors and the text become states, and the states become the next words, one after the other, until the end.
The quick brown fox jumps over the lazy dog. The five boxing wizards jump quickly. Pack my box with five dozen jugs.
North, south, east, west. Spring, summer, autumn, winter. Monday, Tuesday, Wednesday, Thursday, Friday, Saturday.
Red, orange, yellow, green, blue, purple, brown, black, white, grey. Zero, one, two, three, four, five, six, seven.
"""
