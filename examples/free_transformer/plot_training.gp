# gnuplot -c plot_training.gp training_log.csv training.svg
set datafile separator ','
set terminal svg size 900,700 background 'white'
set output ARG2

set multiplot layout 2,1 title 'Free Transformer'
set grid
set xlabel 'step'

set ylabel 'nats a byte'
plot ARG1 using 'step':'bound/elbo' with lines linewidth 2 title 'evidence bound', \
     ARG1 using 'step':'loss/total' with lines title 'loss', \
     ARG1 using 'step':'loss/reconstruction' with lines title 'reconstruction'

set ylabel 'bits a byte'
set yrange [0:*]
plot ARG1 using 'step':'latent/kl_bits' with lines linewidth 2 title 'latent KL'
unset multiplot
