# gnuplot -c plot_synthetic.gp FOLDER samples.svg '0.015625 0.125 1 8'
# A row of pixels for each sample: underscores light, the target blue, noise orange, what does not belong there black.
set terminal svg size 900,640 background 'white' font 'sans-serif,14' noenhanced
set output ARG2
set palette maxcolors 4 defined (0 '#eeeeee', 1 '#0072b2', 2 '#e69f00', 3 '#000000')
set cbrange [0:3]
unset colorbox
unset tics
set autoscale fix
set yrange [*:*] reverse
set multiplot layout words(ARG3),2 margins 0.14,0.98,0.03,0.90 spacing 0.02,0.02
budget(kappa) = kappa < 1 ? sprintf('1/%g bit', 1 / kappa) : sprintf(kappa == 1 ? '%g bit' : '%g bits', kappa)
do for [kappa in ARG3] {
  set label 1 budget(real(kappa)) at graph -0.04,0.5 right
  if (kappa eq word(ARG3, 1)) { set title 'a Z of its own for each sample' } else { unset title }
  plot ARG1 . '/kappa_' . kappa . '/own_latents.dat' matrix with image notitle
  unset label 1
  if (kappa eq word(ARG3, 1)) { set title 'one Z for all samples' }
  plot ARG1 . '/kappa_' . kappa . '/one_latent.dat' matrix with image notitle
}
unset multiplot
