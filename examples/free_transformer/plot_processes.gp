# gnuplot -c plot_processes.gp training_log_of_one.csv training_log_of_two.csv processes.svg
# The loss and the latent KL of one process and of two, and how far two are from one.
set datafile separator ','
set terminal svg size 900,700 background 'white' font 'sans-serif,14' noenhanced
set output ARG3

# Okabe and Ito's colours, which differ in lightness, too
one_colour = '#56b4e9'
two_colour = '#000000'
kl_colour = '#d55e00'

set grid linecolor '#dddddd' linetype 1
set border 3
set tics nomirror out
set key at graph 1,1.03 right bottom horizontal Left reverse samplen 2.5
set multiplot layout 3,1 margins 0.14,0.97,0.09,0.9 spacing 0.08 title 'One process and two'

set format x ''
set format y '%4.1f'
set ytics 1
set ylabel "loss\nnats a byte"
plot ARG1 using 'step':'loss/total' with lines linewidth 7 linecolor rgb one_colour title 'one process', \
     ARG2 using 'step':'loss/total' with lines linewidth 1.5 linecolor rgb two_colour title 'two processes'

set ylabel "latent KL\nbits a byte"
set format y '%4.2f'
set ytics 0.1
unset key
plot ARG1 using 'step':'latent/kl_bits' with lines linewidth 7 linecolor rgb one_colour, \
     ARG2 using 'step':'latent/kl_bits' with lines linewidth 1.5 linecolor rgb two_colour

# Both logs side by side: columns of the second come after those of the first. A difference of 0 has no place on this axis.
set key at graph 1,1.03 right bottom horizontal Left reverse samplen 2.5
set ylabel "relative\ndifference"
set ytics 100
set nomytics
set xlabel 'step'
set format x '%g'
set format y '%.0e'
set logscale y
both = "< paste -d, '".ARG1."' '".ARG2."'"
columns = int(system("head -n 1 '".ARG1."' | tr ',' '\n' | wc -l"))
column_of(name) = int(system("head -n 1 '".ARG1."' | tr ',' '\n' | grep -nxF '".name."' | cut -d: -f1"))
loss = column_of('loss/total')
kl = column_of('latent/kl_bits')
plot both using 1:(abs(column(loss + columns) / column(loss) - 1)) every ::1 \
       with linespoints pointtype 7 pointsize 0.3 linecolor rgb two_colour title 'loss', \
     both using 1:(abs(column(kl + columns) / column(kl) - 1)) every ::1 \
       with linespoints pointtype 7 pointsize 0.3 linecolor rgb kl_colour title 'latent KL'
unset multiplot
