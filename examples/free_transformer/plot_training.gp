# gnuplot -c plot_training.gp training_log.csv training.svg validation_log.csv
# What is minimised and what it is made of, in nats, and the bound on held-out text; below it the latent KL and its free bits.
set datafile separator ','
set terminal svg size 900,700 background 'white' font 'sans-serif,14' noenhanced
set output ARG2

# Okabe and Ito's colours, which differ in lightness, too
bound_colour = '#d55e00'
loss_colour = '#56b4e9'
part_colour = '#000000'
held_out_colour = '#009e73'

set grid linecolor '#dddddd' linetype 1
set border 3
set tics nomirror out
# Above the curves, where no line crosses it.
set key at graph 1,1.03 right bottom horizontal Left reverse samplen 2.5
# Numbers of one width, so that the names of both axes stand in one line.
set format y '%4.2f'

# Both panels have the same left and right edge, and one axis of steps.
set multiplot layout 2,1 margins 0.1,0.97,0.1,0.88 spacing 0.11 title 'Training of a Free Transformer'

set ylabel 'nats a byte' offset 1.5,0
set format x ''
# Where the KL stays within its budget the loss is the reconstruction: a wide line shows on both sides of a thin one.
plot ARG1 using 'step':'loss/total' with lines linewidth 7 linecolor rgb loss_colour title 'loss', \
     ARG1 using 'step':'bound/elbo' with lines linewidth 2 linecolor rgb bound_colour title 'evidence bound', \
     ARG1 using 'step':'loss/reconstruction' with lines linewidth 1.5 linecolor rgb part_colour title 'reconstruction', \
     ARG3 using 'step':'bound/elbo' with linespoints linewidth 2 pointtype 7 pointsize 0.7 \
       linecolor rgb held_out_colour title 'bound, held-out text'

set ylabel 'bits a byte' offset 1.5,0
set xlabel 'step'
set format x '%g'
set yrange [0:*]
set offsets 0,0,graph 0.08,0
plot ARG1 using 'step':'latent/kl_bits' with lines linewidth 2 linecolor rgb bound_colour title 'latent KL', \
     ARG1 using 'step':'free_bits' with lines linewidth 2 dashtype 2 linecolor rgb part_colour title 'free bits'
unset multiplot
