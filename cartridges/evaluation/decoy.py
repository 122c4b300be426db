"""An unrelated text for the wrong_cartridge arm, written for this project. All facts in it are invented."""

DECOY = """\
The glasshouse at Vell was put up in the winter of 1871 by a brewer who had no use for it. He had \
bought forty cast-iron ribs at a bankrupt's sale, found that they would not hold the roof of his malt \
floor, and gave them to the town on the condition that something green be kept under them. For nine \
years nothing grew there but nettles. The first gardener, a retired ferryman named Osk Tarrel, brought \
in two carts of river silt and a lemon tree in a herring barrel, and charged a farthing to look at it.

The lemon tree is said to be the one that still stands at the south door, although the head gardener \
of 1930 wrote in her notebook that it had been replaced at least twice. Visitors touch its trunk for \
luck, and the bark is worn smooth at the height of a child's hand. It carries about sixty fruits a year. \
They are too bitter to eat and are boiled with honey for the supper on the last Saturday of March.

Heating was the first trouble. The brewer's ribs let in the wind at every joint, and the stove that the \
council paid for burned a hundredweight of coal a night without keeping the frost from the north wall. In \
1894 a plumber from the next valley, Miss Ada Quill, laid clay pipes under the beds and led the warm water \
of the dye works through them. The water came in blue on Mondays and red on Thursdays, and in the hard \
winter of that year a crack in the pipe coloured the roots of an entire bed of camellias.

Ferns did better than flowers. The tall fern in the middle house came as a spore on the boot of a \
surveyor, or so the label says, and was taken for a weed until it was two metres high. Its fronds uncurl \
in the second week of April with a sound like paper being unfolded. The students who keep the night watch \
claim to hear it. A microphone was hung there in 1988 and recorded eleven hours of dripping water.

The moss room is kept dark. It was a coal cellar until gas came to the street, and the walls are still \
black above the line of the shelves. Thirty-one kinds of moss grow on slates leaned against one another \
like books. The oldest slate was taken from the roof of the chapel when the tower fell, and the moss on \
it has been dated by its thickness, with some optimism, to a century before the glasshouse was built.

Bees were brought in when the peaches failed to set. The hive stands on a bracket outside, with a length \
of drainpipe through the wall, so that the bees may choose between the street and the peach house. They \
choose the street on warm days. The beekeeper's accounts show that the honey tastes of lime blossom in \
July and of the sugar factory in November, and that it has been sold under the same label in both months.

Of the storm of 1927 only the weathercock remains to tell: it was driven tail first through the roof of \
the palm house and stuck in the trunk of a date palm, where it was left. The palm grew around it. Each \
spring the gilding is renewed with a long brush. The school sends its youngest class to guess the way the \
wind blew on that night, and the prize for a right answer is a cactus in a thimble.

Water is drawn from a cistern under the courtyard that holds ninety thousand litres when it is full. It \
has been full three times. A brass float tells the level on a dial by the gate, and the gatekeeper chalks \
the figure on a board at noon. In dry summers the beds are watered by a rota of households, in the order \
of their house numbers, and anyone who forgets must weed the gravel of the long walk on the following \
Sunday while the town band plays.

The library of seeds occupies a cabinet with two hundred small drawers, made by a coffin maker in the \
slack season. Each drawer has a porcelain knob with a painted flower, and about a third of the flowers are \
wrong. Seeds are lent like books. A borrower signs for an envelope, grows what is in it, and brings back \
twice the number of seeds in autumn. The longest overdue envelope was taken out in 1952 by a postman who \
sends a card every Christmas to say that the beans are not ripe yet.

Nobody has ever counted the panes. The glazier who mends them is paid by the pane and has an interest in \
the number; the council, which pays, has its own. Both agree that there are more than four thousand, that \
the green ones came from bottles, and that the single violet pane above the eastern door was a mistake \
that everyone has grown fond of.
"""
